"""Running Braid: the local launcher, container files and the Helm chart."""
