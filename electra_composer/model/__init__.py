"""The paper: generator, discriminator, encoder, masking, and their ComposerModel."""
