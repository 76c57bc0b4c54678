"""A model beside its base and its window alone: figures, results, tables, plots, card."""
