//! Metadata values as a program has them: owned, for writing and for copying from file to file.

use super::GgufError;
use super::cursor::Cursor;

/// Type of a metadata value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names say it")]
pub enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl ValueType {
    /// All of them, by id.
    const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::String,
        Self::Array,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    pub(crate) fn of_id(id: u32) -> Option<Self> {
        Self::ALL.get(usize::try_from(id).ok()?).copied()
    }

    fn id(self) -> u32 {
        Self::ALL
            .iter()
            .position(|&ty| ty == self)
            .expect("the table holds every type") as u32
    }

    /// The name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::U8 => "u8",
            Self::I8 => "i8",
            Self::U16 => "u16",
            Self::I16 => "i16",
            Self::U32 => "u32",
            Self::I32 => "i32",
            Self::F32 => "f32",
            Self::Bool => "bool",
            Self::String => "string",
            Self::Array => "array",
            Self::U64 => "u64",
            Self::I64 => "i64",
            Self::F64 => "f64",
        }
    }

    /// Bytes of a value; `None` for strings and arrays, which say their length themselves.
    pub(crate) fn bytes(self) -> Option<u64> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::String | Self::Array => None,
        }
    }
}

/// The types with a fixed size: variant and Rust type.
macro_rules! with_numbers {
    ($then:ident) => {
        $then! {
            U8 u8, I8 i8, U16 u16, I16 i16, U32 u32, I32 i32, U64 u64, I64 i64, F32 f32, F64 f64
        }
    };
}

macro_rules! define {
    ($($variant:ident $type:ty),*) => {
        /// A metadata value.
        #[derive(Debug, Clone, PartialEq)]
        #[allow(missing_docs, reason = "the names say it")]
        pub enum Value {
            $($variant($type),)*
            Bool(bool),
            String(String),
            Array(Array),
        }

        /// An array among the metadata.
        #[derive(Debug, Clone, PartialEq)]
        #[allow(missing_docs, reason = "the names say it")]
        pub enum Array {
            $($variant(Vec<$type>),)*
            Bool(Vec<bool>),
            String(Vec<String>),
        }

        impl Value {
            /// Its type in the file.
            pub fn value_type(&self) -> ValueType {
                match self {
                    $(Self::$variant(_) => ValueType::$variant,)*
                    Self::Bool(_) => ValueType::Bool,
                    Self::String(_) => ValueType::String,
                    Self::Array(_) => ValueType::Array,
                }
            }

            /// Appends type and value as a file has them.
            pub(crate) fn encode(&self, out: &mut Vec<u8>) {
                out.extend(self.value_type().id().to_le_bytes());
                match self {
                    $(Self::$variant(value) => out.extend(value.to_le_bytes()),)*
                    Self::Bool(value) => out.push(u8::from(*value)),
                    Self::String(text) => encode_string(text, out),
                    Self::Array(array) => array.encode(out),
                }
            }

            /// A scalar from its bytes; `None` for an array or a string that is not UTF-8.
            pub(crate) fn decode(ty: ValueType, bytes: &[u8]) -> Option<Self> {
                Some(match ty {
                    $(ValueType::$variant => Self::$variant(<$type>::from_le_bytes(bytes.try_into().ok()?)),)*
                    ValueType::Bool => Self::Bool(*bytes.first()? != 0),
                    ValueType::String => Self::String(std::str::from_utf8(bytes).ok()?.to_string()),
                    ValueType::Array => return None,
                })
            }
        }

        impl Array {
            /// Type of its elements.
            pub fn element_type(&self) -> ValueType {
                match self {
                    $(Self::$variant(_) => ValueType::$variant,)*
                    Self::Bool(_) => ValueType::Bool,
                    Self::String(_) => ValueType::String,
                }
            }

            /// Number of elements.
            pub fn len(&self) -> usize {
                match self {
                    $(Self::$variant(list) => list.len(),)*
                    Self::Bool(list) => list.len(),
                    Self::String(list) => list.len(),
                }
            }

            /// Whether it has no elements.
            pub fn is_empty(&self) -> bool {
                self.len() == 0
            }

            fn encode(&self, out: &mut Vec<u8>) {
                out.extend(self.element_type().id().to_le_bytes());
                out.extend((self.len() as u64).to_le_bytes());
                match self {
                    $(Self::$variant(list) => out.extend(list.iter().flat_map(|x| x.to_le_bytes())),)*
                    Self::Bool(list) => out.extend(list.iter().map(|&x| u8::from(x))),
                    Self::String(list) => list.iter().for_each(|text| encode_string(text, out)),
                }
            }

            /// An array from the bytes of its elements; `None` where a string is not UTF-8.
            pub(crate) fn decode(element: ValueType, count: u64, bytes: &[u8]) -> Option<Self> {
                Some(match element {
                    $(ValueType::$variant => {
                        let elements = bytes.chunks_exact(size_of::<$type>());
                        let of = |bytes: &[u8]| Some(<$type>::from_le_bytes(bytes.try_into().ok()?));
                        Self::$variant(elements.map(of).collect::<Option<_>>()?)
                    })*
                    ValueType::Bool => Self::Bool(bytes.iter().map(|&byte| byte != 0).collect()),
                    ValueType::String => {
                        let text = |bytes| std::str::from_utf8(bytes).map(str::to_string).ok();
                        Self::String(Strings::new(count, bytes).map(text).collect::<Option<_>>()?)
                    }
                    ValueType::Array => return None,
                })
            }
        }

        $(
            impl From<$type> for Value {
                fn from(value: $type) -> Self {
                    Self::$variant(value)
                }
            }

            impl From<Vec<$type>> for Value {
                fn from(list: Vec<$type>) -> Self {
                    Self::Array(Array::$variant(list))
                }
            }
        )*
    };
}

with_numbers!(define);

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::String(text)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::String(text.to_string())
    }
}

impl From<Vec<String>> for Value {
    fn from(list: Vec<String>) -> Self {
        Self::Array(Array::String(list))
    }
}

pub(crate) fn encode_string(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// The strings of an array, whose lengths opening has checked.
#[derive(Debug, Clone)]
pub(crate) struct Strings<'a> {
    left: u64,
    cursor: Cursor<'a>,
}

impl<'a> Strings<'a> {
    pub(crate) fn new(count: u64, bytes: &'a [u8]) -> Self {
        Self {
            left: count,
            cursor: Cursor::new(bytes),
        }
    }
}

impl<'a> Iterator for Strings<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        self.left = self.left.checked_sub(1)?;
        self.cursor.string(String::new).ok()
    }
}

/// Walks over a value of type `ty` and checks it; returns the element type and the number of elements of an array.
pub(crate) fn skip(
    cursor: &mut Cursor<'_>,
    key: &str,
    ty: ValueType,
) -> Result<Option<(ValueType, u64)>, GgufError> {
    let what = || format!("the value of metadata key `{key}`");
    match ty {
        ValueType::Array => {
            let element = value_type(cursor, key)?;
            let count = cursor.u64(what)?;
            match element {
                ValueType::Array => {
                    return Err(GgufError::NestedArray {
                        key: key.to_string(),
                    });
                }
                ValueType::String => {
                    for _ in 0..count {
                        cursor.string(what)?;
                    }
                }
                fixed => {
                    let bytes = fixed.bytes().and_then(|bytes| bytes.checked_mul(count));
                    let bytes = bytes.ok_or_else(|| GgufError::ArrayOverflow {
                        key: key.to_string(),
                        count,
                    })?;
                    let elements = cursor.take(bytes, what)?;
                    if fixed == ValueType::Bool {
                        check_bools(key, elements)?;
                    }
                }
            }
            Ok(Some((element, count)))
        }
        ValueType::String => cursor.string(what).map(|_| None),
        fixed => {
            let bytes = fixed.bytes().expect("strings and arrays are above");
            let value = cursor.take(bytes, what)?;
            if fixed == ValueType::Bool {
                check_bools(key, value)?;
            }
            Ok(None)
        }
    }
}

pub(crate) fn value_type(cursor: &mut Cursor<'_>, key: &str) -> Result<ValueType, GgufError> {
    let id = cursor.u32(|| format!("the type of metadata key `{key}`"))?;
    ValueType::of_id(id).ok_or_else(|| GgufError::UnknownValueType {
        key: key.to_string(),
        id,
    })
}

fn check_bools(key: &str, bytes: &[u8]) -> Result<(), GgufError> {
    match bytes.iter().find(|&&byte| byte > 1) {
        Some(&found) => Err(GgufError::BadBool {
            key: key.to_string(),
            found,
        }),
        None => Ok(()),
    }
}
