"""Modules: stock building blocks, the lite residual module, and lean modules over `tinytl.ops`."""
