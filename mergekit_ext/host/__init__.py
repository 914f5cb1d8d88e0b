"""The only package that touches mergekit."""
