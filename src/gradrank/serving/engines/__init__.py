"""Engines that serve adapters: one file each."""
