"""Measurements that stand behind the numbers in the README."""
