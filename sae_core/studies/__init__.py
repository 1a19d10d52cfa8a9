"""Questions put to a feature, or to the heads of a model, that one looks at once and keeps."""
