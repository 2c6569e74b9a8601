"""A model of one's own, from files of questions to a decision."""
