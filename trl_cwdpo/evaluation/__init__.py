"""Measure and compare models after training."""
