"""The kinds of source that can be packed, and how each is recognised."""
