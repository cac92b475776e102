"""The processes that share a merge: who does what, what they exchange, and how one that is gone is noticed."""
