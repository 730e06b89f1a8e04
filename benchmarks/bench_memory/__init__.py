"""One large n-gram table with planned rows against the public ways to train one."""
