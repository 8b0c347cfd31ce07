"""Configs of the zoo, as OpenMMLab config files; data, not code to import."""
