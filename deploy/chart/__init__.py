"""The Helm chart and its rendered default."""
