"""Scoring: error rates, BLEU, named normalisers, and the tables that READMEs show."""
