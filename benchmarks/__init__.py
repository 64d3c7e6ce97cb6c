"""Load and side-by-side benchmarks; nothing here is imported by the product."""
