// Light experts: rows over threads. A row's threshold is mostly like the one before, so that few of its keys are looked
// at twice; where that guess is wrong, all are, and the result is the same.
#include "fastmerge/expert.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <stdexcept>
#include <vector>

#include "cpu/api.h"
#include "cpu/pool.h"

namespace fastmerge {
namespace cpu {
namespace {

constexpr int64_t kEntries = 4096;       // places that one piece of work puts or takes
constexpr float kNextThreshold = 0.85f;  // of a row's threshold: where the next row's is looked for

// Finds the columns of one row after the other.
class Rows {
public:
    Rows(const Models& models, int64_t width, int64_t kept)
        : models_(models),
          width_(width),
          kept_(kept),
          keys_(static_cast<size_t>(width)),
          columns_(static_cast<size_t>(width) + 64) {}

    // The columns of the row's `kept` largest keys, rising.
    const uint32_t* columns(int64_t row) {
        kernels().keys(&models_, 0, row * width_, width_, keys_.data());
        int64_t found = at_least(guess_);
        if (found < kept_) {
            some_.assign(keys_.begin(), keys_.end());
            found = at_least(threshold());
        } else if (found > kept_) {
            some_.resize(static_cast<size_t>(found));
            for (size_t i = 0; i < some_.size(); ++i) some_[i] = keys_[columns_[i]];
        }
        uint32_t least = 0;
        if (found > kept_) {
            least = threshold();
            int64_t above = std::count_if(some_.begin(), some_.end(), [&](uint32_t key) { return key > least; });
            keep_first(found, least, kept_ - above);
        } else {
            least = kKeyEnd;
            for (int64_t i = 0; i < kept_; ++i) least = std::min(least, keys_[columns_[static_cast<size_t>(i)]]);
        }
        // Beyond infinity a smaller guess would be no number.
        guess_ = least >= kInfBits ? 0 : bit_cast<uint32_t>(bit_cast<float>(least) * kNextThreshold);
        return columns_.data();
    }

private:
    int64_t at_least(uint32_t low) { return kernels().expert_at_least(keys_.data(), width_, low, columns_.data()); }

    // The kept-th largest of some keys, which are then in another order.
    uint32_t threshold() {
        auto place = some_.begin() + (kept_ - 1);
        std::nth_element(some_.begin(), place, some_.end(), std::greater<uint32_t>());
        return *place;
    }

    // Of the columns found, those with keys above `least` and the first `equal` ones with that key.
    void keep_first(int64_t found, uint32_t least, int64_t equal) {
        size_t kept = 0;
        for (size_t i = 0; i < static_cast<size_t>(found); ++i) {
            uint32_t column = columns_[i], key = keys_[column];
            columns_[kept] = column;
            kept += key > least || (key == least && equal-- > 0);
        }
    }

    Models models_;
    int64_t width_, kept_;
    std::vector<uint32_t> keys_, columns_, some_;
    uint32_t guess_ = kKeyEnd;
};

struct Piece {
    const ExpertArgs* args;
    int64_t begin, end;
};

std::vector<Piece> pieces_of(const std::vector<ExpertArgs>& tensors) {
    std::vector<Piece> pieces;
    for (const ExpertArgs& args : tensors) {
        int64_t kept = 0;
        for (int32_t p = 0; p < args.count; ++p) kept += args.parts[p].kept;
        if (kept == 0) continue;
        int64_t rows = std::max<int64_t>(1, kEntries / kept);
        for (int64_t row = 0; row < args.rows; row += rows)
            pieces.push_back({&args, row, std::min(row + rows, args.rows)});
    }
    return pieces;
}

void over_pieces(const std::vector<Piece>& pieces, const std::function<void(const Piece&, int thread)>& work) {
    parallel(static_cast<int64_t>(pieces.size()),
             [&](int64_t item, int thread) { work(pieces[static_cast<size_t>(item)], thread); });
}

// A row of sums for each thread, where several experts meet in a tensor.
class Totals {
public:
    explicit Totals(const std::vector<ExpertArgs>& tensors) {
        int64_t width = 0;
        for (const ExpertArgs& args : tensors) width = args.count > 1 ? std::max(width, args.width) : width;
        if (width == 0) return;
        rows_.assign(static_cast<size_t>(threads()), std::vector<float>(static_cast<size_t>(width)));
        touched_.assign(static_cast<size_t>(threads()), std::vector<uint8_t>(static_cast<size_t>(width), 0));
    }
    float* row(int thread) { return rows_.empty() ? nullptr : rows_[static_cast<size_t>(thread)].data(); }
    uint8_t* touched(int thread) { return touched_.empty() ? nullptr : touched_[static_cast<size_t>(thread)].data(); }

private:
    std::vector<std::vector<float>> rows_;
    std::vector<std::vector<uint8_t>> touched_;
};

// What would be written beside a tensor is refused before anything is written.
void check_columns(const std::vector<Piece>& pieces) {
    std::atomic<bool> beyond{false};
    over_pieces(pieces, [&](const Piece& piece, int) {
        for (int32_t p = 0; p < piece.args->count; ++p) {
            const ExpertPart& part = piece.args->parts[p];
            int64_t begin = piece.begin * part.kept, end = piece.end * part.kept;
            if (begin < end && kernels().expert_most_column(&part, begin, end) >= piece.args->width) beyond = true;
        }
    });
    if (beyond) throw std::invalid_argument("an expert's column lies beyond its row");
}

}  // namespace

void expert_extract(const Models& models, int64_t rows, int64_t width, int64_t kept, void* columns,
                    int32_t column_bytes, void* values, int32_t dtype) {
    if (kept == 0 || rows == 0) return;
    int64_t together = std::max<int64_t>(1, kTieBlock / width);
    parallel((rows + together - 1) / together, [&](int64_t item, int) {
        Rows finder(models, width, kept);
        for (int64_t row = item * together; row < std::min((item + 1) * together, rows); ++row) {
            const uint32_t* found = finder.columns(row);
            if (column_bytes == 2) {
                std::copy(found, found + kept, static_cast<uint16_t*>(columns) + row * kept);
            } else {
                std::copy(found, found + kept, static_cast<int32_t*>(columns) + row * kept);
            }
            char* out = static_cast<char*>(values) + row * kept * dtype_size(dtype);
            kernels().expert_gather(&models, row * width, found, kept, out, dtype);
        }
    });
}

void expert_apply(const std::vector<ExpertArgs>& tensors) {
    std::vector<Piece> pieces = pieces_of(tensors);
    check_columns(pieces);
    Totals totals(tensors);
    over_pieces(pieces, [&](const Piece& piece, int thread) {
        kernels().expert_apply(piece.args, piece.begin, piece.end, totals.row(thread), totals.touched(thread));
    });
}

void expert_revert(const std::vector<ExpertArgs>& tensors, int64_t* changed) {
    std::vector<Piece> pieces = pieces_of(tensors);
    check_columns(pieces);
    Totals totals(tensors);
    std::vector<std::atomic<int64_t>> counts(tensors.size());
    for (auto& count : counts) count = 0;
    over_pieces(pieces, [&](const Piece& piece, int thread) {
        counts[static_cast<size_t>(piece.args - tensors.data())] +=
            kernels().expert_changed(piece.args, piece.begin, piece.end, totals.row(thread), totals.touched(thread));
    });
    bool any = false;
    for (size_t t = 0; t < tensors.size(); ++t) {
        changed[t] = counts[t];
        any = any || changed[t] != 0;
    }
    if (any) return;
    over_pieces(pieces, [](const Piece& piece, int) { kernels().expert_restore(piece.args, piece.begin, piece.end); });
}

}  // namespace cpu
}  // namespace fastmerge
