def ensure(): pass
