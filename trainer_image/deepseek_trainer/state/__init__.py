"""Checkpoints that are either whole and verified or not used: folder, manifest, commit, save and
restore.
"""
