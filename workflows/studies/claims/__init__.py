"""The papers' claims, one part each: what is measured with a seed, kept as JSON, and judged over seeds."""
