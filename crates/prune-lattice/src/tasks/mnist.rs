//! MNIST from IDX files, plain or gzipped: 28 pixels a step, the rows of the image or all pixels permuted once; or a pixel a step.
//!
//! The folder holds `train*-images-idx3-ubyte` and `t10k-images-idx3-ubyte` with the label files of the same names
//! (`labels-idx1`), each with or without `.gz`. Training images are deformed anew in every epoch.

use super::Sizes;
use crate::{
    data::{Augment, Augmentation, Dataset, Examples, Inputs, Sequences, Targets},
    error::{Error, Result},
    rnn::InputKind,
    seed,
};
use rand::seq::SliceRandom;
use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
};

/// How an image becomes a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// A row a step.
    Rows,
    /// As many pixels a step, all of them permuted once.
    Permuted,
    /// A pixel a step.
    Pixels,
}

/// One permutation for all networks, so that they can be compared.
const PERMUTATION_SEED: u64 = 0;
const IMAGES: &str = "images-idx3-ubyte";
/// Bytes of an unpacked file at most: 60,000 images take 47 MB.
const MAX_BYTES: u64 = 1 << 30;
const IMAGES_MAGIC: u32 = 0x803;
const LABELS_MAGIC: u32 = 0x801;

fn wrong(file: &Path, reason: impl Into<String>) -> Error {
    Error::Data {
        file: file.into(),
        reason: reason.into(),
    }
}

/// Sizes of the axes and the bytes of an IDX file.
fn read_idx(file: &Path, magic: u32, axes: usize) -> Result<(Vec<usize>, Vec<u8>)> {
    let io = |source| Error::Io {
        file: file.into(),
        source,
    };
    let mut bytes = fs::read(file).map_err(io)?;
    if file.extension().is_some_and(|e| e == "gz") {
        let mut plain = Vec::new();
        let gzip = flate2::read::GzDecoder::new(bytes.as_slice());
        // A page of a file that claims to be small must not fill the memory.
        gzip.take(MAX_BYTES).read_to_end(&mut plain).map_err(io)?;
        bytes = plain;
    }
    let header = 4 + 4 * axes;
    if bytes.len() < header {
        return Err(wrong(
            file,
            format!("{} bytes are too few for an IDX header", bytes.len()),
        ));
    }
    let words: Vec<u32> = bytes[..header]
        .chunks_exact(4)
        .map(|w| u32::from_be_bytes([w[0], w[1], w[2], w[3]]))
        .collect();
    if words[0] != magic {
        return Err(wrong(
            file,
            format!("magic number {:#x}, expected {magic:#x}", words[0]),
        ));
    }
    let dims: Vec<usize> = words[1..].iter().map(|&d| d as usize).collect();
    let expected = dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    if expected != Some(bytes.len() - header) {
        return Err(wrong(
            file,
            format!("axes {dims:?} but {} bytes of data", bytes.len() - header),
        ));
    }
    bytes.drain(..header);
    Ok((dims, bytes))
}

/// The image file whose name starts so, the first in alphabetical order, and its label file.
fn find(folder: &Path, prefix: &str) -> Result<(PathBuf, PathBuf)> {
    let entries = fs::read_dir(folder).map_err(|source| Error::Io {
        file: folder.into(),
        source,
    })?;
    let mut names: Vec<String> = entries
        .filter_map(|e| e.ok()?.file_name().into_string().ok())
        .collect();
    names.sort();
    let images =
        |n: &&String| n.starts_with(prefix) && n.strip_suffix(".gz").unwrap_or(n).ends_with(IMAGES);
    let Some(name) = names.iter().find(images) else {
        let reason = format!("no file {prefix}*-{IMAGES} or {prefix}*-{IMAGES}.gz");
        return Err(wrong(folder, reason));
    };
    let labels = name.replace(IMAGES, "labels-idx1-ubyte");
    let plain = labels.trim_end_matches(".gz");
    let found = [labels.as_str(), plain, &format!("{plain}.gz")]
        .into_iter()
        .find(|l| names.iter().any(|n| n == l))
        .unwrap_or(plain)
        .to_owned();
    Ok((folder.join(name), folder.join(found)))
}

/// Rows of the images `from..from + count`.
fn examples(
    folder: &Path,
    prefix: &str,
    (from, count): (usize, usize),
    order: Order,
) -> Result<(Sequences, Augmentation)> {
    let (image_file, label_file) = find(folder, prefix)?;
    let (dims, pixels) = read_idx(&image_file, IMAGES_MAGIC, 3)?;
    let (label_dims, labels) = read_idx(&label_file, LABELS_MAGIC, 1)?;
    let (rows, width) = (dims[1], dims[2]);
    let end = from.saturating_add(count);
    if rows == 0 || width == 0 || dims[0] < end || label_dims[0] < end {
        return Err(wrong(
            &image_file,
            format!(
                "{} images {rows}x{width} and {} labels, {end} asked for",
                dims[0], label_dims[0]
            ),
        ));
    }
    if labels[from..end].iter().any(|&l| l > 9) {
        return Err(wrong(&label_file, "a label is above 9"));
    }
    let size = rows * width;
    let (dim, steps) = match order {
        Order::Pixels => (1, size),
        Order::Rows | Order::Permuted => (width, rows),
    };
    let order = (order == Order::Permuted).then(|| {
        let mut order: Vec<u32> = (0..size as u32).collect();
        order.shuffle(&mut seed::rng(PERMUTATION_SEED, "pixels"));
        order
    });
    let image = |pixels: &[u8]| -> Vec<f32> {
        let value = |p: usize| f32::from(pixels[p]) / 255.0;
        match &order {
            None => (0..size).map(value).collect(),
            Some(order) => order.iter().map(|&p| value(p as usize)).collect(),
        }
    };
    let images = pixels[from * size..end * size].chunks_exact(size);
    let values = images.flat_map(image).collect();
    let classes = labels[from..end].iter().map(|&l| u32::from(l)).collect();
    let sequences = Sequences::new(
        Inputs::Vectors { dim, values },
        &vec![steps; count],
        Targets::Classes(classes),
    )?;
    let augmentation = Augmentation::new(Augment::Elastic, rows, width, order);
    Ok((sequences, augmentation))
}

pub(super) fn dataset(folder: &Path, sizes: Sizes, order: Order) -> Result<Dataset> {
    let (train, augmentation) = examples(folder, "train", (0, sizes.train), order)?;
    let (valid, _) = examples(folder, "train", (sizes.train, sizes.valid), order)?;
    let (test, _) = examples(folder, "t10k", (0, sizes.test), order)?;
    let dim = match train.inputs() {
        Inputs::Vectors { dim, .. } => *dim,
        Inputs::Symbols(_) => 1,
    };
    Ok(Dataset {
        train: Examples::Sequences(train.augmented(augmentation)?),
        valid: Examples::Sequences(valid),
        test: Examples::Sequences(test),
        input: InputKind::Dense { dim },
        outputs: 10,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn idx(magic: u32, dims: &[u32], data: &[u8]) -> Vec<u8> {
        let words = std::iter::once(&magic).chain(dims);
        words
            .flat_map(|w| w.to_be_bytes())
            .chain(data.iter().copied())
            .collect()
    }

    #[test]
    fn files_are_read_and_bad_ones_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, bytes: Vec<u8>| fs::write(dir.path().join(name), bytes).unwrap();
        let sizes = Sizes {
            train: 2,
            valid: 1,
            test: 1,
        };
        assert!(matches!(
            dataset(dir.path(), sizes, Order::Rows),
            Err(Error::Data { .. })
        ));
        let pixels: Vec<u8> = (0..3 * 6).map(|p| p * 10).collect();
        for prefix in ["train", "t10k"] {
            put(
                &format!("{prefix}-images-idx3-ubyte"),
                idx(IMAGES_MAGIC, &[3, 2, 3], &pixels),
            );
            put(
                &format!("{prefix}-labels-idx1-ubyte"),
                idx(LABELS_MAGIC, &[3], &[4, 5, 6]),
            );
        }
        let data = dataset(dir.path(), sizes, Order::Rows).unwrap();
        let Examples::Sequences(valid) = &data.valid else {
            unreachable!()
        };
        assert_eq!(valid.targets(), &Targets::Classes(vec![6]));
        let Inputs::Vectors { dim: 3, values } = valid.inputs() else {
            unreachable!()
        };
        assert_eq!(values[0], 120.0 / 255.0);
        // Gzipped files are the same data; a permutation changes places only.
        let zipped = tempfile::tempdir().unwrap();
        for file in fs::read_dir(dir.path()).unwrap() {
            let path = file.unwrap().path();
            let name = format!("{}.gz", path.file_name().unwrap().to_str().unwrap());
            let out = fs::File::create(zipped.path().join(name)).unwrap();
            let mut out = flate2::write::GzEncoder::new(out, flate2::Compression::fast());
            std::io::Write::write_all(&mut out, &fs::read(path).unwrap()).unwrap();
            out.finish().unwrap();
        }
        assert_eq!(dataset(zipped.path(), sizes, Order::Rows).unwrap(), data);
        let Examples::Sequences(permuted) =
            dataset(dir.path(), sizes, Order::Permuted).unwrap().valid
        else {
            unreachable!()
        };
        let Inputs::Vectors { values: moved, .. } = permuted.inputs() else {
            unreachable!()
        };
        let sorted = |v: &[f32]| {
            let mut v = v.to_vec();
            v.sort_by(f32::total_cmp);
            v
        };
        assert_eq!(sorted(moved), sorted(values));
        // A pixel a step is the same image, longer.
        let by_pixels = dataset(dir.path(), sizes, Order::Pixels).unwrap();
        assert_eq!(by_pixels.input, InputKind::Dense { dim: 1 });
        let Examples::Sequences(valid) = by_pixels.valid else {
            unreachable!()
        };
        assert_eq!(valid.length(0), 6);
        assert_eq!(
            valid.inputs(),
            &Inputs::Vectors {
                dim: 1,
                values: values.clone()
            }
        );
        assert!(matches!(
            dataset(dir.path(), Sizes { train: 3, ..sizes }, Order::Rows),
            Err(Error::Data { .. })
        ));
        put(
            "t10k-labels-idx1-ubyte",
            idx(IMAGES_MAGIC, &[3], &[4, 5, 6]),
        );
        match dataset(dir.path(), sizes, Order::Rows) {
            Err(Error::Data { file, reason }) => {
                assert!(file.ends_with("t10k-labels-idx1-ubyte") && reason.contains("0x803"));
            }
            other => panic!("{other:?}"),
        }
        put(
            "t10k-labels-idx1-ubyte",
            idx(LABELS_MAGIC, &[9], &[4, 5, 6]),
        );
        assert!(matches!(
            dataset(dir.path(), sizes, Order::Rows),
            Err(Error::Data { .. })
        ));
        put("t10k-labels-idx1-ubyte", vec![0, 0]);
        assert!(matches!(
            dataset(dir.path(), sizes, Order::Rows),
            Err(Error::Data { .. })
        ));
    }
}
