"""The labelled images of a study, from the files on disk to augmented batches."""
