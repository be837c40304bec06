//! One line for each method: the enum, its names and the dispatch to the file that implements it.

/// Makes an enum of methods. Each line names a variant, the struct with its parameters, which implements the trait after
/// the enum's name, and how the method is called in flags and files.
macro_rules! methods {
    (
        $(#[$of_enum:meta])*
        pub enum $name:ident: $trait:ident {
            $($(#[$of_variant:meta])* $text:literal => $variant:ident($method:ty),)*
        }
    ) => {
        $(#[$of_enum])*
        #[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(tag = "name")]
        #[non_exhaustive]
        pub enum $name {
            $($(#[$of_variant])* #[serde(rename = $text)] $variant($method),)*
        }

        impl $name {
            /// The names of all methods.
            pub const NAMES: &'static [&'static str] = &[$($text),*];

            /// The method of this name, with its default parameters.
            pub fn named(name: &str) -> Option<Self> {
                match name {
                    $($text => Some(Self::$variant(<$method>::default())),)*
                    _ => None,
                }
            }

            /// Its name.
            pub fn name(&self) -> &'static str {
                match self {
                    $(Self::$variant(_) => $text,)*
                }
            }

            pub(crate) fn method(&self) -> &dyn $trait {
                match self {
                    $(Self::$variant(method) => method,)*
                }
            }
        }

        $(impl From<$method> for $name {
            fn from(method: $method) -> Self {
                Self::$variant(method)
            }
        })*
    };
}

pub(crate) use methods;
