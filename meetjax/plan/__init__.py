"""`meetjax plan`: compiles the real training or decoding step for TPUs that are not there, and says whether it fits and what it costs."""
