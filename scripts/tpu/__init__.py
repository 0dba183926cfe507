"""Compile what swa_dist runs on TPU cores with the TPU's own compiler, on a machine without TPU."""
