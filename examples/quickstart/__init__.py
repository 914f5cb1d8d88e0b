"""Four small vision transformers, merged by stock mergekit commands: see the README."""
