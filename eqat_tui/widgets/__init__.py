"""Widgets of the app: they paint what they are given and keep no truth of their own."""
