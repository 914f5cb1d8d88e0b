"""Pure functions of torch tensors: no file names, no logging, no configuration, no mergekit."""
