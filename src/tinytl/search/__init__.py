"""Feature-extractor adaptation: choose the sub-network that suits the data and the memory."""
