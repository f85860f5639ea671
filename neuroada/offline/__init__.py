"""Selection and merge over safetensors files, block of rows by block of rows: no model is built, none need fit."""
