"""Which method and which factor: merges of real fine-tunes, at defaults, calibrated, and tuned."""
