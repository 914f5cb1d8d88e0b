"""Which method and which factor: merges of real fine-tunes, as published, calibrated, and tuned."""
