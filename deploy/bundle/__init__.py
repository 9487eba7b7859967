"""The folder that serves anywhere: model, settings, model card, container files, checksums."""
