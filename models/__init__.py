"""The backbones, one file a family. Importing this package registers them into timm."""
