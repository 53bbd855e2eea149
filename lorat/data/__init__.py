"""Files and hub -> canonical text -> token ids, with an account of every row."""
