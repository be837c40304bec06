//! GGUF files made by hand, byte by byte, independently of the crate's writer.

/// Bytes under construction.
#[derive(Clone, Default)]
pub(crate) struct Bytes(pub(crate) Vec<u8>);

impl Bytes {
    pub(crate) fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(crate) fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    pub(crate) fn string(self, text: &[u8]) -> Self {
        self.u64(text.len() as u64).raw(text)
    }
}

/// A metadata entry: key, type id, bytes of the value.
#[derive(Clone)]
pub(crate) struct Key(pub(crate) Vec<u8>, pub(crate) u32, pub(crate) Vec<u8>);

impl Key {
    pub(crate) fn u32(key: &str, value: u32) -> Self {
        Self(key.into(), 4, value.to_le_bytes().into())
    }

    pub(crate) fn u16(key: &str, value: u16) -> Self {
        Self(key.into(), 2, value.to_le_bytes().into())
    }

    pub(crate) fn i32(key: &str, value: i32) -> Self {
        Self(key.into(), 5, value.to_le_bytes().into())
    }

    pub(crate) fn string(key: &str, text: &[u8]) -> Self {
        Self(key.into(), 8, Bytes::default().string(text).0)
    }

    /// An array of elements of type `element`, `count` of them declared.
    pub(crate) fn array(key: &str, element: u32, count: u64, elements: &[u8]) -> Self {
        let bytes = Bytes::default().u32(element).u64(count).raw(elements);
        Self(key.into(), 9, bytes.0)
    }
}

/// A tensor's entry: name, dimensions as stored (the fastest first), type id, offset.
#[derive(Clone)]
pub(crate) struct Tensor(
    pub(crate) Vec<u8>,
    pub(crate) Vec<u64>,
    pub(crate) u32,
    pub(crate) u64,
);

impl Tensor {
    /// A vector of f32.
    pub(crate) fn f32(name: &str, width: u64, offset: u64) -> Self {
        Self(name.into(), vec![width], 0, offset)
    }
}

/// A file with its parts, to be changed and put together.
#[derive(Clone)]
pub(crate) struct File {
    pub(crate) magic: [u8; 4],
    pub(crate) version: u32,
    /// Declared counts where they are not the true ones.
    pub(crate) tensor_count: Option<u64>,
    pub(crate) key_count: Option<u64>,
    pub(crate) keys: Vec<Key>,
    pub(crate) tensors: Vec<Tensor>,
    pub(crate) alignment: usize,
    pub(crate) data: Vec<u8>,
}

impl Default for File {
    /// Two vectors of eight f32.
    fn default() -> Self {
        let values = (0..16u16).flat_map(|x| f32::from(x).to_le_bytes());
        Self {
            magic: *b"GGUF",
            version: 3,
            tensor_count: None,
            key_count: None,
            keys: vec![Key::string("general.architecture", b"llama")],
            tensors: vec![Tensor::f32("a", 8, 0), Tensor::f32("b", 8, 32)],
            alignment: 32,
            data: values.collect(),
        }
    }
}

impl File {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = Bytes::default()
            .raw(&self.magic)
            .u32(self.version)
            .u64(self.tensor_count.unwrap_or(self.tensors.len() as u64))
            .u64(self.key_count.unwrap_or(self.keys.len() as u64));
        for Key(key, ty, value) in &self.keys {
            bytes = bytes.string(key).u32(*ty).raw(value);
        }
        for Tensor(name, dims, ty, offset) in &self.tensors {
            bytes = bytes.string(name).u32(dims.len() as u32);
            for &dim in dims {
                bytes = bytes.u64(dim);
            }
            bytes = bytes.u32(*ty).u64(*offset);
        }
        let padded = bytes.0.len().next_multiple_of(self.alignment);
        bytes.0.resize(padded, 0);
        bytes.raw(&self.data).0
    }
}
