"""Receipts as tables, charts and pages."""
