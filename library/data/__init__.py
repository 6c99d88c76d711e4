"""FILES ON DISK -> CACHED ENTRIES -> BATCHES.

sources, pairs, captions, images, geometry, buckets, masks and plan say what there is and what it should become, without
torch. store keeps what was encoded; cached and batches hand it to the trainer.
"""
