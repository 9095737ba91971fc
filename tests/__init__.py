"""Read as a specification: each test states a relation, and its body checks it."""
