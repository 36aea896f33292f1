"""Loaders: from the files that a site has to raw records. A kind of source is one file here."""

from fedgraft_client.loaders.load import Loaded, load, survey

__all__ = ["Loaded", "load", "survey"]
