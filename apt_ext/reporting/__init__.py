"""`apt_ext.report`: one page that shows what a run has made of a model."""
