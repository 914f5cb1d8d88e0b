"""Adapters in and out: folders, the Hub, live models."""
