"""The companion to arXiv 2603.29466: what backs the notebooks. It imports the library, never the other way round."""
