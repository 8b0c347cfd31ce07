"""Model cards and the facts that they are made from; data, not code to import."""
