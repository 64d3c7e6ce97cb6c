"""Verifiers: what scores samples, chosen by name from the operator's configuration."""

from router.verifiers.base import Check, Critic, Verifier, check
from router.verifiers.generative import GenerativeVerifier
from router.verifiers.registry import Verifiers

__all__ = ["Check", "Critic", "GenerativeVerifier", "Verifier", "Verifiers", "check"]
