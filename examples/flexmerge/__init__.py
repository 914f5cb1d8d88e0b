"""Eight small vision transformers, merged to every size between one model and eight."""
