"""Small tools that every room uses: files, inputs, model state, modules, processes, progress, export."""
