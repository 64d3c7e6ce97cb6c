"""What Braid's processes share: settings, wire messages, errors, logs, the ``braid`` command."""

__version__ = "0.1.0"
