"""The figures for people: tables, plots, pages, the models of a sweep beside each other."""
