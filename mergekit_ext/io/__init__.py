"""Files and folders: weights and their headers, configurations, staged outputs, journals."""
