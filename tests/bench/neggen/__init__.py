"""NegGenBench: does a negative prompt remove an essential part, and what else suffers? ``docs/neggen.md`` tells how."""
