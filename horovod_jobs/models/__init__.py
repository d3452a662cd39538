"""Reference models: plain ``torch.nn.Module`` classes that take ``num_classes`` and ``input_shape``."""
