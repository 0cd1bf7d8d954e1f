"""The release of an adapter: gate, folder, model card, verification, export."""
